"""Figures of the paper (arXiv 2509.20986), as printed."""

# Table 1. Columns: ImageNet-1K top-1, ADE20K mIoU, NYUd-v2 RMSE, iNaturalist-
# 2019 top-1, mean top-1 of ImageNet-R and -v2 (distribution shift), mean top-1
# of Aircraft, Pets, Food-101 and Flowers (fine-grained).
TABLE_1_COLUMNS = ('IN', 'ADE', 'NYU', 'iNat', 'DS', 'FG')
TABLE_1_MODELS = {
    'vitl': (79.58, 26.57, 0.9157, 71.42, 54.20, 82.27),
    'vits': (76.05, 19.57, 1.1065, 65.28, 44.48, 77.39),
    'vitt': (58.03, 14.20, 1.1807, 43.95, 28.75, 62.02),
    'deit3l': (84.10, 26.11, 1.2311, 57.59, 56.95, 75.35),
    'deit3b': (82.50, 25.14, 1.1781, 56.41, 54.73, 74.65),
    'deit3s': (78.90, 20.28, 1.2961, 45.39, 49.50, 67.84),
}
TABLE_1_DISTILLED = {
    ('vitl_to_vits', 'fitnet'): (72.50, 25.15, 0.9903, 52.12, 40.21, 71.13),
    ('vitl_to_vits', 'singer'): (79.13, 30.06, 0.9026, 57.21, 48.91, 77.59),
    ('vitl_to_vitt', 'fitnet'): (62.43, 18.73, 1.0093, 40.02, 32.32, 62.48),
    ('vitl_to_vitt', 'vitkd'): (5.07, 11.92, 1.1903, 23.69, 2.08, 33.52),
    ('vitl_to_vitt', 'singer'): (70.59, 21.76, 0.9406, 41.11, 38.87, 64.61),
    ('deit3l_to_deit3b', 'fitnet'): (60.00, 26.79, 1.1625, 50.04, 31.53,
                                     74.78),
    ('deit3l_to_deit3b', 'vitkd'): (66.54, 19.58, 1.2525, 30.78, 35.77,
                                    58.36),
    ('deit3l_to_deit3b', 'singer'): (79.37, 29.47, 1.1514, 53.50, 49.14,
                                     75.41),
    ('deit3s_to_deit3t', 'fitnet'): (51.41, 16.06, 1.2920, 32.81, 23.74,
                                     58.53),
    ('deit3s_to_deit3t', 'vitkd'): (35.56, 8.71, 1.4487, 19.93, 15.31,
                                    45.13),
    ('deit3s_to_deit3t', 'singer'): (63.50, 20.67, 0.9827, 37.68, 32.28,
                                     64.32),
}

# Table 3: cosine between F and F_hat, at the distilled layer and after the
# next block
TABLE_3 = {'refined': 0.9566, 'next': 0.9731}

# Table 4: trained on a subset of ImageNet. IN top-1, ADE20K mIoU, NYU RMSE
TABLE_4 = {
    'random': (10.83, 4.35, 1.3048),
    'nullspace': (10.57, 4.32, 1.1943),
    'outlier': (11.04, 4.77, 1.1870),
    'info': (11.06, 4.38, 1.1870),
    'all': (11.57, 4.99, 1.1690),
}

# Table 5a: (E_prob, E_safe) of the trained up- and down-projections
TABLE_5A = {
    ('random', 'up', 'intermediate'): (0.2565, 0.2532),
    ('nullspace', 'up', 'intermediate'): (0.1479, 0.8337),
    ('random', 'up', 'last'): (0.2537, 0.2541),
    ('nullspace', 'up', 'last'): (0.1833, 0.7589),
    ('random', 'down', 'intermediate'): (0.3100, 0.2494),
    ('nullspace', 'down', 'intermediate'): (0.2847, 0.5485),
    ('random', 'down', 'last'): (0.3025, 0.2641),
    ('nullspace', 'down', 'last'): (0.2746, 0.5774),
}

# Table 5b: D_G of the teacher against (refined teacher, student)
TABLE_5B = {'outlier': (14.22, 72.36), 'all': (7.25, 41.71)}

# Table 7: (mean, median, p95) of norm inflation in the teacher
TABLE_7 = {
    'G_FFN1': (0.0719, 0.0714, 0.0844),
    'G_FFN2': (0.7988, 0.7945, 0.8571),
    'delta_FFN': (0.1871, 0.1852, 0.2210),
    'delta_SA': (0.1417, 0.1415, 0.1611),
}

# Table 8: (null directions of the linearised FFN, of the full Jacobian)
TABLE_8 = {
    'relative_l2': (0.169, 0.191),
    'cosine': (0.9787, 0.9564),
    'cka': (0.9975, 0.9947),
}
