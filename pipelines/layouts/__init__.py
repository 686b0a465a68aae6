"""How data sets lie on disk: BraTS folders, lists, Decathlon and nnU-Net tasks, and what file names say."""
