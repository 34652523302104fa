"""Isolation: untrusted answers executed where they can harm nothing."""
