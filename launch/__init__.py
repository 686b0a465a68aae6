"""The commands, each a thin `main` over `engine` and `pipelines`."""
