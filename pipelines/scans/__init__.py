"""The files of one case: bytes, NIfTI header, voxels."""
