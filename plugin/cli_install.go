package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
)

// install copies this program into the path and links it as a plugin of Docker's
// command line.
func install(c *cli) func(context.Context, []string) error {
	bin := c.flags.String("bin-dir", "/usr/local/bin", "`folder` for the command weft")
	plugins := c.flags.String("cli-plugin-dir", "/usr/local/lib/docker/cli-plugins", "`folder` for the link docker-weft; empty: none")
	return func(_ context.Context, args []string) error {
		if len(args) > 0 {
			return usageError(fmt.Sprintf("takes no argument, got %.60q", args[0]))
		}
		self, err := os.Executable()
		if err != nil {
			return err
		}
		target := filepath.Join(*bin, "weft")
		if err := copyProgram(self, target); err != nil {
			return err
		}
		fmt.Fprintf(c.out, "installed %s (%s)\n", target, buildVersion())
		if *plugins == "" {
			return nil
		}
		link := filepath.Join(*plugins, "docker-weft")
		if err := linkProgram(target, link); err != nil {
			return err
		}
		fmt.Fprintf(c.out, "linked %s: docker weft works now\n", link)
		return nil
	}
}

// copyProgram writes the program beside the target and renames it, so that one
// that runs is not disturbed.
func copyProgram(from, to string) error {
	a, err := os.Stat(from)
	if err != nil {
		return err
	}
	if b, err := os.Stat(to); err == nil && os.SameFile(a, b) {
		return nil
	}
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
		return err
	}
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer func() { _ = in.Close() }()
	out, err := os.OpenFile(to+".new", os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o755)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	if err := errors.Join(err, out.Chmod(0o755), out.Close()); err != nil {
		return err
	}
	return os.Rename(to+".new", to)
}

// linkProgram makes a link, in place of an old link but not of anything else.
func linkProgram(target, link string) error {
	target, err := filepath.Abs(target)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(link), 0o755); err != nil {
		return err
	}
	st, err := os.Lstat(link)
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return err
	case st.Mode()&fs.ModeSymlink == 0:
		return fmt.Errorf("%s is not a link; remove it first", link)
	default:
		if err := os.Remove(link); err != nil {
			return err
		}
	}
	return os.Symlink(target, link)
}
