"""Files, tables, text, values and processes, as every part of the project uses them."""
