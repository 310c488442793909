# SiNGER as in the paper, for a teacher of 24 blocks
singer = dict(
    layers=(17, 23),
    adapter=dict(rank=16, init='nullspace'),
    loss_outlier=dict(quantile=0.95, loss_weight=0.01),
    loss_info=dict(loss_weight=1.0))
