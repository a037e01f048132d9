"""What people look at: tables for the terminal, and the page of a run. No other room knows this one."""
