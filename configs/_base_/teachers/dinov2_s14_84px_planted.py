# DINOv2-S/14 with planted artifacts: after block 7, about 30 % of the patch
# tokens get a vector in a subspace of 8 dimensions. Norms grow more than
# tenfold from there to the output, where such tokens still stand out by 4 to 7
# times.
_base_ = ['./dinov2_s14_84px.py']
teacher = dict(
    backbone=dict(
        _delete_=True,
        type='mmsinger.PlantedArtifacts',
        backbone=_base_.teacher.backbone,
        after=7,
        share=0.3,
        norm=(60., 100.),
        dims=8,
        direction='random'))
