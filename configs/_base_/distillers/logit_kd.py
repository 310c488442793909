# Class logits alone: teacher and student need heads (teachers/*_cls.py,
# students/*_cls.py)
distiller = dict(
    type='mmsinger.LogitKDDistiller',
    loss_kd=dict(temperature=4.0, loss_weight=1.0))
