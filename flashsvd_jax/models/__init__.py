"""Models as pure functions over weights; configuration alone tells one family from another."""
