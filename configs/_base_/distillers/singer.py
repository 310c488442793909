# SiNGER as in the paper.
# Each file in this folder defines `distiller`: the type and its settings.
# Which blocks are distilled stands in the teacher's file.
distiller = dict(
    type='mmsinger.SiNGERDistiller',
    adapter=dict(rank=16, init='nullspace'),
    loss_outlier=dict(quantile=0.95, loss_weight=0.01),
    loss_info=dict(loss_weight=1.0))
