package main

import (
	"encoding/json"
	"io"
	"runtime/debug"
)

// version is set by the linker (-X main.version=…); see buildVersion.
var version string

// printMetadata answers Docker's question what this CLI plugin is (docker/cli,
// cli-plugins/metadata).
func printMetadata(out io.Writer) int {
	_ = json.NewEncoder(out).Encode(map[string]string{
		"SchemaVersion":    "0.1.0",
		"Vendor":           "Weft",
		"Version":          buildVersion(),
		"ShortDescription": "Networks across hosts: status, plan, audit",
		"URL":              "https://github.com/weftnet/weft",
	})
	return exitFine
}

// buildVersion returns the version that the build set, else the commit, else "dev".
func buildVersion() string {
	if version != "" {
		return version
	}
	if b, ok := debug.ReadBuildInfo(); ok {
		for _, s := range b.Settings {
			if s.Key == "vcs.revision" && len(s.Value) >= 12 {
				return "dev-" + s.Value[:12]
			}
		}
	}
	return "dev"
}
