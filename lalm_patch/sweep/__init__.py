"""Many runs in: which are launched, where, and how they ended; one table and one file of them out."""
