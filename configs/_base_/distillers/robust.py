# For any teacher: outliers lose the directions that set them apart where they
# arise in it, found once before the first step. Where there are none, this is
# FitNet, bit by bit. Not from the paper; figures in docs/evidence.md.
distiller = dict(
    type='mmsinger.FitNetDistiller',
    targets=dict(outliers=dict(type='mmsinger.RemoveOutlierSubspace',
                               mad=6.0, inside=True)))
