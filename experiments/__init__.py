"""What people run: one script per experiment, and the command line over them."""
