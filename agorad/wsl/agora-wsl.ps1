# Lets peers reach agorad in WSL2: forwards its TCP ports from Windows to WSL, whose address changes at every
# start, opens them in the firewall, and starts WSL when you log on. Written by `agoractl service install`.
#
#   .\agora-wsl.ps1              sets it up (asks for administrator rights: ports and firewall are the machine's)
#   .\agora-wsl.ps1 -Uninstall   takes all of it away again
#   .\agora-wsl.ps1 -Follow      what the log-on task runs: keeps WSL up and the forwarding on its address
[CmdletBinding()]
param(
    [switch]$Uninstall,
    [switch]$Follow,
    [string]$User = "$env:USERDOMAIN\$env:USERNAME"  # whose log-on counts; an administrator may be somebody else
)

$ErrorActionPreference = 'Stop'
$Distribution = '@DISTRIBUTION@'
$Ports = @(@PORTS@)
$Mirrored = $@MIRRORED@
$Name = 'agorad (WSL2)'
$VmCreator = '{40E0AC32-46A5-438A-A0B2-2B479E8F2E90}'
$Home_ = Join-Path $env:ProgramData 'agora'
$Kept = Join-Path $Home_ 'agora-wsl.ps1'

function Test-Administrator {
    $identity = [Security.Principal.WindowsIdentity]::GetCurrent()
    $principal = New-Object Security.Principal.WindowsPrincipal($identity)
    return $principal.IsInRole([Security.Principal.WindowsBuiltInRole]::Administrator)
}

function Get-WslAddress {
    # The first IPv4 address of the distribution; starts it if it is not up.
    $said = (& wsl.exe -d $Distribution --exec hostname -I) -join ' '
    return ($said -split '\s+' | Where-Object { $_ -match '^\d+\.\d+\.\d+\.\d+$' } | Select-Object -First 1)
}

function Get-ForwardedAddress([int]$Port) {
    $rows = & netsh.exe interface portproxy show v4tov4
    foreach ($row in $rows) {
        if ($row -match "^0\.0\.0\.0\s+$Port\s+(\S+)\s+$Port\s*$") { return $Matches[1] }
    }
    return ''
}

function Update-Forwarding {
    if ($Mirrored) { return }
    $address = Get-WslAddress
    if (-not $address) { return }
    foreach ($port in $Ports) {
        if ((Get-ForwardedAddress $port) -ne $address) {
            & netsh.exe interface portproxy set v4tov4 listenaddress=0.0.0.0 listenport=$port connectaddress=$address connectport=$port | Out-Null
            Write-Output "TCP $port -> ${address}:$port"
        }
    }
}

function Remove-All {
    Stop-ScheduledTask -TaskName $Name -ErrorAction SilentlyContinue
    Unregister-ScheduledTask -TaskName $Name -Confirm:$false -ErrorAction SilentlyContinue
    Get-NetFirewallRule -DisplayName $Name -ErrorAction SilentlyContinue | Remove-NetFirewallRule
    if (Get-Command Get-NetFirewallHyperVRule -ErrorAction SilentlyContinue) {
        Get-NetFirewallHyperVRule -DisplayName $Name -ErrorAction SilentlyContinue | Remove-NetFirewallHyperVRule
    }
    foreach ($port in $Ports) {
        if (Get-ForwardedAddress $port) {
            & netsh.exe interface portproxy delete v4tov4 listenaddress=0.0.0.0 listenport=$port | Out-Null
        }
    }
}

if ($Follow) {
    # A distribution without a Windows process in it is shut down when idle, services or not: this one stays in it.
    $stay = $null
    while ($true) {
        try {
            if ($null -eq $stay -or $stay.HasExited) {
                $stay = Start-Process wsl.exe -ArgumentList @('-d', "`"$Distribution`"", '--exec', 'sleep', 'infinity') -WindowStyle Hidden -PassThru
            }
            Update-Forwarding | Out-Null
        }
        catch { }  # WSL may be about to start or to update itself; the next round looks again
        Start-Sleep -Seconds 15
    }
}

if (-not (Test-Administrator)) {
    # The one step that needs administrator rights: Windows asks for them in a window of its own.
    $words = @('-NoProfile', '-ExecutionPolicy', 'Bypass', '-File', "`"$PSCommandPath`"")
    $words += @('-User', "`"$User`"")
    if ($Uninstall) { $words += '-Uninstall' }
    $elevated = Start-Process powershell.exe -ArgumentList $words -Verb RunAs -Wait -PassThru
    exit $elevated.ExitCode
}

Remove-All
if ($Uninstall) {
    if (Test-Path $Home_) { Remove-Item $Home_ -Recurse -Force }
    Write-Output 'removed: log-on task, firewall rules, forwarding'
    exit 0
}

New-Item -ItemType Directory -Path $Home_ -Force | Out-Null
if ($PSCommandPath -ne $Kept) { Copy-Item $PSCommandPath $Kept -Force }
# Only administrators may change what runs with administrator rights at every log-on.
& icacls.exe $Home_ /inheritance:r /grant '*S-1-5-32-544:(OI)(CI)F' '*S-1-5-18:(OI)(CI)F' '*S-1-5-32-545:(OI)(CI)RX' | Out-Null

New-NetFirewallRule -DisplayName $Name -Direction Inbound -Action Allow -Protocol TCP -LocalPort $Ports | Out-Null
if ($Mirrored -and (Get-Command New-NetFirewallHyperVRule -ErrorAction SilentlyContinue)) {
    foreach ($port in $Ports) {
        New-NetFirewallHyperVRule -Name "agorad-$port" -DisplayName $Name -Direction Inbound -Action Allow -VMCreatorId $VmCreator -Protocol TCP -LocalPorts $port | Out-Null
    }
}
Update-Forwarding

$action = New-ScheduledTaskAction -Execute 'powershell.exe' -Argument "-NoProfile -WindowStyle Hidden -ExecutionPolicy Bypass -File `"$Kept`" -Follow"
$trigger = New-ScheduledTaskTrigger -AtLogOn -User $User
$settings = New-ScheduledTaskSettingsSet -AllowStartIfOnBatteries -DontStopIfGoingOnBatteries -ExecutionTimeLimit ([TimeSpan]::Zero) -RestartCount 3 -RestartInterval (New-TimeSpan -Minutes 1)
$who = New-ScheduledTaskPrincipal -UserId $User -LogonType Interactive -RunLevel Highest
Register-ScheduledTask -TaskName $Name -Action $action -Trigger $trigger -Settings $settings -Principal $who -Force | Out-Null
Start-ScheduledTask -TaskName $Name
Write-Output "set up: TCP $($Ports -join ', ') to $Distribution, now and at every log-on of $User"
