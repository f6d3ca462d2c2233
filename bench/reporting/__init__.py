"""What `report.py` makes of the rows: tables and plots."""
