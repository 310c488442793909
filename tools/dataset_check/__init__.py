"""Is a data set complete, readable, and what its config says?"""
from dataset_check.check import check_config, check_known
from dataset_check.known import KNOWN

__all__ = ['KNOWN', 'check_config', 'check_known']
