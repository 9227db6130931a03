"""From a command line to objects: checks, help, and the files that come with the package."""
