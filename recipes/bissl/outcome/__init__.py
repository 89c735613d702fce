"""The pipeline as a whole, and what is made of it: results, report, tables, figures."""
