# Plain feature distillation, the paper's baseline.
# Each file in this folder defines `distiller`: the type and its settings.
# Which blocks are distilled stands in the teacher's file.
distiller = dict(type='mmsinger.FitNetDistiller')
