"""Files, tables, text, options and errors: helpers that every part of the project uses."""
