"""The configuration tree, as a package so that it travels with the installation."""
