# SiNGER as in the official code's main runs, departures from the paper
# included: which null directions, how L_info is taken, which student layers
distiller = dict(
    type='mmsinger.SiNGERDistiller',
    layer_map='official',
    last_layer='listed',
    adapter=dict(
        rank=64, init='nullspace', selection='threshold', threshold=0.05),
    loss_outlier=dict(quantile=0.97, loss_weight=0.01),
    loss_info=dict(intermediate='mse', last='previous', loss_weight=1.0))
