# Plain feature distillation on the same layers, the paper's baseline
fitnet = dict(layers=(17, 23))
