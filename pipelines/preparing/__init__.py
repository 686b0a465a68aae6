"""Scans become prepared volumes on disk: the files of a case, and the store that holds many."""
