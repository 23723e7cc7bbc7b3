"""What takes jobs away on a cluster: each time the run goes on by itself and ends as the undisturbed one, bit for bit."""
