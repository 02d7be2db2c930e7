"""Other ways to integrate a batch in which every row has its own interval."""
