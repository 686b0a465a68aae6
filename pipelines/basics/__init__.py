"""Files, tables, text, options and processes: helpers that every part of the project uses."""
