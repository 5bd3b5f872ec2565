"""Checks and quizzes of the chapters, a module each.

A chapter imports its module as ``check`` and calls one check below each exercise. They stand here, so that no
chapter shows what it asks for.
"""
