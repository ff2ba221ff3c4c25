"""Weight averaging where people train: a module for each library, which it alone imports."""
