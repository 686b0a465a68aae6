"""From scans on disk, or synthetic ones, to training crops: find, decode, resample, store, augment."""
