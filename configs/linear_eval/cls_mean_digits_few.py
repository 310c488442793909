# Mean patch token, trained on 300 scenes
_base_ = ['./cls_mean_digits.py']
train_dataloader = dict(dataset=dict(indices=300))
