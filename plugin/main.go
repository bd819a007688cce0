// Command weft is the Weft network plugin for Docker and the command that talks
// to it: one binary.
//
// "weft plugin" is the process that Docker starts (config.json's entrypoint). It
// serves two Unix sockets: Docker's, with the NetworkDriver and the IpamDriver
// protocol (server.go, routes.go), and the admin socket (admin.go), which the
// other verbs and Prometheus read. run.go is the list of its tasks and the only
// place that knows all packages; gate.go is the door between calls and what
// serves them. Every other verb is a client (cli.go).
//
// The package decides nothing about networks: driver, ipam and dataplane do.
package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
)

func main() {
	os.Exit(dispatch(context.Background(), os.Args, os.Stdout, os.Stderr))
}

// dispatch runs the verb and returns the exit status: 0 fine, 1 a problem or
// differences, 2 wrong usage.
func dispatch(ctx context.Context, argv []string, out, errOut io.Writer) int {
	args := verbArgs(argv)
	if len(args) == 0 {
		args = []string{"help"}
	}
	switch args[0] {
	case "plugin":
		if err := run(ctx, args[1:], errOut); err != nil {
			fmt.Fprintln(errOut, "weft:", err)
			return exitProblem
		}
		return exitFine
	case "docker-cli-plugin-metadata":
		return printMetadata(out)
	}
	return command(ctx, args, out, errOut)
}

// verbArgs returns the arguments from the verb on. Docker runs a CLI plugin as
// "docker-weft [global flags] weft VERB …".
func verbArgs(argv []string) []string {
	args := argv[1:]
	if filepath.Base(argv[0]) == "docker-weft" {
		if i := slices.Index(args, "weft"); i >= 0 {
			return args[i+1:]
		}
	} else if len(args) > 0 && args[0] == "weft" {
		return args[1:]
	}
	return args
}
