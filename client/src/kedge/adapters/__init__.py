"""Workers in other frameworks. Each module here imports the framework that it is named after, and no other."""
