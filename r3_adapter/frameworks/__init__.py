"""Plug-ins for training frameworks: they are given by flags, and no file of the framework is edited."""
