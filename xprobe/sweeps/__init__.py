"""Many models: a plan of runs, the engines that compute them, and the table that compares them."""
