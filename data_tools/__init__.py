"""Scripts for people, on top of moepp.data.prepare; nothing in moepp imports them."""
