"""The commands: each reads its options first, and then imports the work."""
