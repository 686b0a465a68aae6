"""Prepared volumes become training and validation batches: crops, draws, DALI pipelines, loaders."""
