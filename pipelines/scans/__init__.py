"""The files of one case: bytes, NIfTI header, voxels, and their grid and resampling."""
