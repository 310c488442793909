# ViTKD as in its own code. Blocks and weights are the method's, whatever the
# teacher's file says; for the SiNGER authors' variant see docs/methods.md.
distiller = dict(
    type='mmsinger.ViTKDDistiller',
    mimic_layers=(0, 1),
    generate_layer=-1,
    mimic_weight=3e-5,
    generate_weight=3e-6)
