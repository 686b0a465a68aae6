"""The results of runs to read and look at: tables, pictures, the report page, comparisons."""
