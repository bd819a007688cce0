package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
)

// Exit statuses of the command.
const (
	exitFine    = 0
	exitProblem = 1 // something is wrong, or differs
	exitUsage   = 2
)

// cli is one run of the command.
type cli struct {
	out    io.Writer
	admin  adminClient
	docker dockerClient
	json   bool
	flags  *flag.FlagSet
}

// verb is one row of the command table.
type verb struct {
	name, args, help string
	hidden           bool
	// prepare registers the verb's own flags and returns what runs it.
	prepare func(c *cli) func(ctx context.Context, args []string) error
}

func verbs() []verb {
	return append([]verb{
		{name: "status", help: "what is wrong, in words; then this host, its underlay, peers and networks", prepare: simple(status)},
		{name: "networks", help: "networks of this host", prepare: simple(networks)},
		{name: "endpoints", help: "endpoints in them, here and on peers", prepare: simple(endpoints)},
		{name: "ports", help: "ports of this host that Weft publishes, on networks with its own gateway", prepare: simple(ports)},
		{name: "flows", help: "what containers of this host send to whom, what became of it, packets and bytes; -f: as it is sent", prepare: flows},
		{name: "peers", help: "other hosts", prepare: simple(peers)},
		{name: "encryption", args: "[rotate | revoke HOST | restore HOST]", help: "how packets of encrypted networks go to each host; rotate: change this host's key, without losing a packet; revoke: all hosts drop that one", prepare: encryption},
		{name: "ipam", help: "address pools and their leases", prepare: simple(pools)},
		{name: "plan", args: "NETWORK", help: "what the kernel should hold for a network (name, id, VNI, or \"host\"), what it holds, the difference", prepare: plan},
		{name: "audit", help: "differences between Docker, records and kernel", prepare: audit},
		{name: "forget", args: "NETWORK", help: "remove what is left of a network (name, id or VNI) that Docker no longer has: its removal came while the plugin was disabled", prepare: forget},
		{name: "version", help: "versions of command and plugin", prepare: simple(versions)},
		{name: "install", help: "put this command into the path, and make it \"docker weft\"", prepare: install},
		{name: "settings", help: "the plugin's settings as a table", hidden: true, prepare: simple(func(_ context.Context, c *cli) error { printSettings(c.out); return nil })},
	}, testVerbs()...)
}

// simple is the prepare of a verb without arguments and flags of its own.
func simple(fn func(context.Context, *cli) error) func(*cli) func(context.Context, []string) error {
	return func(c *cli) func(context.Context, []string) error {
		return func(ctx context.Context, args []string) error {
			if len(args) > 0 {
				return usageError(fmt.Sprintf("takes no argument, got %.60q", args[0]))
			}
			return fn(ctx, c)
		}
	}
}

// usageError is a command line that makes no sense.
type usageError string

func (e usageError) Error() string { return string(e) }

// errFound ends a verb that has printed what is wrong.
var errFound = errors.New("something is wrong")

// command runs a verb of the client.
func command(ctx context.Context, args []string, out, errOut io.Writer) int {
	name := args[0]
	switch name {
	case "help", "-h", "-help", "--help":
		printHelp(out)
		return exitFine
	case "-v", "-version", "--version":
		name = "version"
	}
	for _, v := range verbs() {
		if v.name == name {
			return runVerb(ctx, v, args[1:], out, errOut)
		}
	}
	fmt.Fprintf(errOut, "weft: there is no command %.60q; weft help lists them\n", name)
	return exitUsage
}

func runVerb(ctx context.Context, v verb, args []string, out, errOut io.Writer) int {
	c := &cli{out: out, flags: flag.NewFlagSet(v.name, flag.ContinueOnError)}
	c.flags.SetOutput(io.Discard)
	format := c.flags.String("o", "", "`json` for JSON in place of a table")
	c.flags.StringVar(&c.admin.path, "socket", "", "admin `socket` of the plugin (default $WEFT_SOCKET, else the one found under "+pluginSockets+")")
	run := v.prepare(c)
	rest, err := parseFlags(c.flags, args)
	switch {
	case errors.Is(err, flag.ErrHelp):
		printVerbHelp(out, v, c.flags)
		return exitFine
	case err != nil:
		err = usageError(err.Error())
	case *format != "" && *format != "json":
		err = usageError(fmt.Sprintf("-o %.60q is not known; use json", *format))
	default:
		c.json = *format == "json"
		err = run(ctx, rest)
	}
	var usage usageError
	switch {
	case err == nil:
		return exitFine
	case errors.Is(err, errFound):
		return exitProblem
	case errors.As(err, &usage):
		fmt.Fprintf(errOut, "weft %s: %s; weft %s -h explains it\n", v.name, oneLine(err), v.name)
		return exitUsage
	}
	fmt.Fprintf(errOut, "weft %s: %s\n", v.name, oneLine(err))
	return exitProblem
}

// parseFlags accepts flags behind arguments too, as docker does.
func parseFlags(flags *flag.FlagSet, args []string) (rest []string, err error) {
	for {
		if err := flags.Parse(args); err != nil {
			return nil, err
		}
		if flags.NArg() == 0 {
			return rest, nil
		}
		rest = append(rest, flags.Arg(0))
		args = flags.Args()[1:]
	}
}

func oneLine(err error) string { return strings.Join(strings.Fields(err.Error()), " ") }

func printHelp(out io.Writer) {
	fmt.Fprint(out, "Usage: weft COMMAND [-o json]   (also: docker weft COMMAND)\n\n")
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	for _, v := range verbs() {
		if !v.hidden {
			fmt.Fprintf(w, "  %s\t%s\n", strings.TrimSpace(v.name+" "+v.args), v.help)
		}
	}
	_ = w.Flush()
	fmt.Fprint(out, "\nExit status: 0 all is well, 1 something is wrong or differs, 2 wrong usage.\n")
}

func printVerbHelp(out io.Writer, v verb, flags *flag.FlagSet) {
	fmt.Fprintf(out, "Usage: weft %s\n\n%s\n\n", strings.TrimSpace(v.name+" [flags] "+v.args), v.help)
	flags.SetOutput(out)
	flags.PrintDefaults()
}

// print writes v as JSON if that was asked for, and reports whether it did.
func (c *cli) print(v any) bool {
	if !c.json {
		return false
	}
	enc := json.NewEncoder(c.out)
	enc.SetIndent("", "  ")
	_ = enc.Encode(v) // a closed pipe is not worth a word
	return true
}

// table writes aligned columns; the first row is the head.
func (c *cli) table(rows [][]string) {
	w := tabwriter.NewWriter(c.out, 0, 0, 2, ' ', 0)
	for _, r := range rows {
		fmt.Fprintln(w, strings.TrimRight(strings.Join(r, "\t"), "\t"))
	}
	_ = w.Flush()
}
