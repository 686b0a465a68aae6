"""What is left of a run to read and to look at: tables, pictures, the report, the comparison of runs."""
