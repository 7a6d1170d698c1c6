"""The seven published repositories at small width, file by file, and what people have of them on their disks."""
