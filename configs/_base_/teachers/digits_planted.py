# The demo's teacher with planted artifacts: after block 1, about 3 % of the
# patch tokens get a long vector along one direction
_base_ = ['./digits.py']
teacher = dict(
    backbone=dict(
        _delete_=True,
        type='mmsinger.PlantedArtifacts',
        backbone=_base_.teacher.backbone,
        after=1,
        share=0.03,
        norm=(7., 10.),
        dims=1,
        direction='random'),
    mean=[127.5, 127.5, 127.5],
    std=[64., 64., 64.],
    feature_cache=4000)
