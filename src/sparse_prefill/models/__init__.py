"""Support for models of other libraries: one module and one optional extra for each library."""
