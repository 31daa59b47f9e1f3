"""Images for people: contact sheets of masks and parts."""
