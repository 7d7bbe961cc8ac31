"""What was asked for, and what follows from it: keys, checks, the plan, names of plug-ins."""
