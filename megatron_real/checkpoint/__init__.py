"""Saves a run and resumes it: what is saved, how it is written, and how it is read again."""
