# The demo's teacher with planted artifacts and its own head: what planting
# costs its own predictions (tools/test.py)
_base_ = ['../demo/digits_teacher.py']
model = dict(backbone=dict(
    _delete_=True,
    type='mmsinger.PlantedArtifacts',
    backbone=_base_.model.backbone,
    after=1,
    share=0.03,
    norm=(7., 10.),
    dims=1,
    direction='random'))
test_dataloader = dict(num_workers=0, persistent_workers=False)
