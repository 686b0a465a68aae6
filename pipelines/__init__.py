"""From scans on disk to training crops: find, decode, resample, store, augment; and the MONAI oracle of it."""
