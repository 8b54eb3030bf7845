"""The doctor: is everything as it should be, before time is spent on training?"""
